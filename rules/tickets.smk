# Masks of every interval, their distances, and the networks cut out.


rule prune_per_epoch:
    input:
        reads("prune-per-epoch"),
    output:
        makes("prune-per-epoch"),
    log:
        log_of("prune-per-epoch"),
    benchmark:
        benchmark_of("prune-per-epoch")
    priority: priority_of("prune-per-epoch")
    conda:
        CONDA
    threads: compute("threads")
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=gpus("prune-per-epoch"),
    params:
        digest=digest("prune-per-epoch"),
    shell:
        "ebdiff prune-per-epoch {wildcards.experiment:q} --search {wildcards.search:q}"
        " --criterion {wildcards.criterion} --weights {wildcards.weights} --seed {wildcards.seed}"
        " --threads {threads} > {log:q} 2>&1"


rule hamming_matrix:
    input:
        reads("hamming-matrix"),
    output:
        makes("hamming-matrix"),
    log:
        log_of("hamming-matrix"),
    benchmark:
        benchmark_of("hamming-matrix")
    priority: priority_of("hamming-matrix")
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=grow(800),
        runtime=grow(10),
        gpu=0,
    params:
        digest=digest("hamming-matrix"),
    shell:
        "ebdiff hamming-matrix {wildcards.experiment:q} --search {wildcards.search:q}"
        " --criterion {wildcards.criterion} --weights {wildcards.weights} --seed {wildcards.seed}"
        " > {log:q} 2>&1"


rule select_eb_epoch:
    input:
        reads("select-eb-epoch"),
    output:
        makes("select-eb-epoch"),
    log:
        log_of("select-eb-epoch"),
    benchmark:
        benchmark_of("select-eb-epoch")
    priority: priority_of("select-eb-epoch")
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow(10),
        gpu=0,
    params:
        digest=digest("select-eb-epoch"),
    shell:
        "ebdiff select-eb-epoch {wildcards.experiment:q} --search {wildcards.search:q}"
        " --criterion {wildcards.criterion} --weights {wildcards.weights} --rate {wildcards.rate}"
        " --seed {wildcards.seed} > {log:q} 2>&1"
