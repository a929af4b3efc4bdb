# Latent diffusion's first stage, where the codec encodes: trained on the data or given, used once, measured.


rule train_first_stage:
    input:
        reads("train-first-stage"),
    output:
        makes("train-first-stage"),
    log:
        log_of("train-first-stage"),
    benchmark:
        benchmark_of("train-first-stage")
    priority: priority_of("train-first-stage")
    conda:
        CONDA
    threads: compute("threads")
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=gpus("train-first-stage"),
    params:
        digest=digest("train-first-stage"),
    shell:
        "ebdiff train-first-stage {wildcards.experiment:q} --threads {threads} > {log:q} 2>&1"


rule encode_latents:
    input:
        reads("encode-latents"),
    output:
        makes("encode-latents"),
    log:
        log_of("encode-latents"),
    benchmark:
        benchmark_of("encode-latents")
    priority: priority_of("encode-latents")
    conda:
        CONDA
    threads: job_threads
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=gpus("encode-latents"),
    params:
        digest=digest("encode-latents"),
    shell:
        "ebdiff encode-latents {wildcards.experiment:q} --threads {threads} > {log:q} 2>&1"


rule measure_first_stage:
    input:
        reads("measure-first-stage"),
    output:
        makes("measure-first-stage"),
    log:
        log_of("measure-first-stage"),
    benchmark:
        benchmark_of("measure-first-stage")
    priority: priority_of("measure-first-stage")
    conda:
        CONDA
    threads: compute("threads")
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=gpus("measure-first-stage"),
    params:
        digest=digest("measure-first-stage"),
    shell:
        "ebdiff measure-first-stage {wildcards.experiment:q} --threads {threads} > {log:q} 2>&1"
