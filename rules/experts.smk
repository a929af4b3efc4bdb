# Experts, shared by every run that lists them; a milestone goes on from the one before.


rule finetune_region:
    input:
        reads("finetune-region"),
    output:
        makes("finetune-region"),
    log:
        log_of("finetune-region"),
    benchmark:
        benchmark_of("finetune-region")
    priority: priority_of("finetune-region")
    conda:
        CONDA
    threads: job_threads
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=gpus("finetune-region"),
    params:
        digest=digest("finetune-region"),
    shell:
        "ebdiff finetune-region {wildcards.experiment:q} --expert {wildcards.expert:q}"
        " --milestone {wildcards.milestone:q} --seed {wildcards.seed} --threads {threads}"
        " > {log:q} 2>&1"
