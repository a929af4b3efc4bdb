# Experts, shared by every run that lists them; a milestone goes on from the one before.


rule finetune_region:
    input:
        of(inputs.expert, "expert", "milestone", "seed"),
        images=images,
    output:
        state=layout.MILESTONE,
        ledger=layout.LEDGER,
        stats=layout.STATS,
    log:
        layout.log("seed{seed}/finetune-region.{expert}.{milestone}"),
    benchmark:
        layout.benchmark("seed{seed}/finetune-region.{expert}.{milestone}")
    priority: 30
    conda:
        CONDA
    threads: job_threads
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=compute("gpus"),
    params:
        digest=of(digests.expert_digest, "expert", "milestone"),
    shell:
        "ebdiff finetune-region {wildcards.experiment:q} --expert {wildcards.expert:q}"
        " --milestone {wildcards.milestone:q} --seed {wildcards.seed} --threads {threads}"
        " > {log:q} 2>&1"
