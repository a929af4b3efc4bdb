# Images of every run, and how far they are from the real ones.


rule sample:
    input:
        reads("sample"),
    output:
        makes("sample"),
    log:
        log_of("sample"),
    benchmark:
        benchmark_of("sample")
    priority: priority_of("sample")
    conda:
        CONDA
    threads: job_threads
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=gpus("sample"),
    params:
        digest=digest("sample"),
    shell:
        "ebdiff sample {wildcards.experiment:q} --run {wildcards.run:q} --seed {wildcards.seed}"
        " --threads {threads} > {log:q} 2>&1"


rule fid:
    input:
        reads("fid"),
    output:
        makes("fid"),
    log:
        log_of("fid"),
    benchmark:
        benchmark_of("fid")
    priority: priority_of("fid")
    conda:
        CONDA
    threads: compute("threads")
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=gpus("fid"),
    params:
        digest=digest("fid"),
    shell:
        "ebdiff fid {wildcards.experiment:q} --run {wildcards.run:q} --seed {wildcards.seed}"
        " --threads {threads} > {log:q} 2>&1"
