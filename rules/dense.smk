# What networks cost, and dense training with the early-bird search.


rule measure_cost:
    output:
        layout.COST,
    log:
        layout.log("measure-cost"),
    benchmark:
        layout.benchmark("measure-cost")
    priority: 100
    conda:
        CONDA
    # All cores, only to be alone: timed are as many threads as training uses.
    threads: all_cores
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow(30),
        gpu=one_gpu,
        slurm_extra="--exclusive",
    params:
        digest=of(digests.cost_digest),
        threads=compute("threads"),
    shell:
        "ebdiff measure-cost {wildcards.experiment:q} --threads {params.threads} > {log:q} 2>&1"


rule train_dense:
    input:
        images=images,
    output:
        snapshots=directory(layout.SNAPSHOTS),
        masks=layout.DENSE_MASKS,
        last=layout.DENSE_LAST,
        ledger=layout.DENSE_LEDGER,
        stats=layout.DENSE_STATS,
    log:
        layout.log("seed{seed}/train-dense.{search}"),
    benchmark:
        layout.benchmark("seed{seed}/train-dense.{search}")
    priority: 50  # everything else waits for it
    conda:
        CONDA
    threads: job_threads
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=compute("gpus"),
    params:
        digest=of(digests.dense_digest, "search"),
    shell:
        "ebdiff train-dense {wildcards.experiment:q} --search {wildcards.search:q}"
        " --seed {wildcards.seed} --threads {threads} > {log:q} 2>&1"
