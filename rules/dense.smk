# What networks cost, and dense training with the early-bird search.


rule measure_cost:
    output:
        makes("measure-cost"),
    log:
        log_of("measure-cost"),
    benchmark:
        benchmark_of("measure-cost")
    priority: priority_of("measure-cost")
    conda:
        CONDA
    # All cores, only to be alone: timed are as many threads as training uses.
    threads: all_cores
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow(30),
        gpu=gpus("measure-cost"),
        slurm_extra="--exclusive",
    params:
        digest=digest("measure-cost"),
        threads=compute("threads"),
    shell:
        "ebdiff measure-cost {wildcards.experiment:q} --threads {params.threads} > {log:q} 2>&1"


rule train_dense:
    input:
        reads("train-dense"),
    output:
        makes("train-dense"),
    log:
        log_of("train-dense"),
    benchmark:
        benchmark_of("train-dense")
    priority: priority_of("train-dense")
    conda:
        CONDA
    threads: job_threads
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=gpus("train-dense"),
    params:
        digest=digest("train-dense"),
    shell:
        "ebdiff train-dense {wildcards.experiment:q} --search {wildcards.search:q}"
        " --seed {wildcards.seed} --threads {threads} > {log:q} 2>&1"
