# Images of every run, and how far they are from the real ones.


rule sample:
    input:
        of(inputs.experts, "run", "seed"),
    output:
        samples=layout.SAMPLES,
        grid=layout.SAMPLES_PNG,
        ledger=layout.SAMPLE_LEDGER,
    log:
        layout.log("seed{seed}/sample.{run}"),
    benchmark:
        layout.benchmark("seed{seed}/sample.{run}")
    priority: 20
    conda:
        CONDA
    threads: job_threads
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=compute("gpus"),
    params:
        digest=of(digests.sample_digest, "run"),
    shell:
        "ebdiff sample {wildcards.experiment:q} --run {wildcards.run:q} --seed {wildcards.seed}"
        " --threads {threads} > {log:q} 2>&1"


rule fid:
    input:
        of(inputs.references),
        samples=layout.SAMPLES,
        ledger=layout.SAMPLE_LEDGER,
    output:
        layout.METRICS,
    log:
        layout.log("seed{seed}/fid.{run}"),
    benchmark:
        layout.benchmark("seed{seed}/fid.{run}")
    priority: 10
    conda:
        CONDA
    threads: compute("threads")
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=one_gpu,
    params:
        digest=of(digests.metrics_digest),
    shell:
        "ebdiff fid {wildcards.experiment:q} --run {wildcards.run:q} --seed {wildcards.seed}"
        " --threads {threads} > {log:q} 2>&1"
