# Shared by every experiment that uses a dataset: images, the classifier, reference statistics.


rule prepare_data:
    output:
        makes("prepare-data"),
    log:
        log_of("prepare-data"),
    benchmark:
        benchmark_of("prepare-data")
    priority: priority_of("prepare-data")
    localrule: True  # it may need the network, which compute nodes often lack
    conda:
        CONDA
    threads: 2
    resources:
        mem_mb=1500,
        runtime=60,
        gpu=0,
    params:
        digest=digest("prepare-data"),
    shell:
        "ebdiff prepare-data {wildcards.dataset:q} --threads {threads} > {log:q} 2>&1"


rule train_classifier:
    input:
        reads("train-classifier"),
    output:
        makes("train-classifier"),
    log:
        log_of("train-classifier"),
    benchmark:
        benchmark_of("train-classifier")
    priority: priority_of("train-classifier")
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=grow(1500),
        runtime=grow(60),
        gpu=0,
    params:
        digest=digest("train-classifier"),
    shell:
        "ebdiff train-classifier {wildcards.dataset:q} --threads {threads} > {log:q} 2>&1"


rule reference_stats:
    input:
        reads("reference-stats"),
    output:
        makes("reference-stats"),
    log:
        log_of("reference-stats"),
    benchmark:
        benchmark_of("reference-stats")
    priority: priority_of("reference-stats")
    conda:
        CONDA
    threads: compute("threads")
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=gpus("reference-stats"),
    params:
        digest=digest("reference-stats"),
    shell:
        "ebdiff reference-stats {wildcards.dataset:q} --protocol {wildcards.protocol}"
        " --images {wildcards.number} --threads {threads} > {log:q} 2>&1"
