# Shared by every experiment that uses a dataset: images, the classifier, reference statistics.


rule prepare_data:
    output:
        layout.IMAGES,
        layout.LABELS,
        layout.MANIFEST,
    log:
        layout.log("prepare-data", layout.DATA),
    benchmark:
        layout.benchmark("prepare-data", layout.DATA)
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
        gpu=0,
    params:
        digest=of_dataset,
    shell:
        "ebdiff prepare-data {wildcards.dataset:q} > {log:q} 2>&1"


rule train_classifier:
    input:
        images=layout.IMAGES,
        labels=layout.LABELS,
        manifest=layout.MANIFEST,
    output:
        network=layout.CLASSIFIER,
        ledger=layout.CLASSIFIER_LEDGER,
    log:
        layout.log("train-classifier", layout.DATA),
    benchmark:
        layout.benchmark("train-classifier", layout.DATA)
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=1500,
        runtime=60,
        gpu=0,
    params:
        digest=of_dataset,
    shell:
        "ebdiff train-classifier {wildcards.dataset:q} --threads {threads} > {log:q} 2>&1"


rule reference_stats:
    input:
        images=layout.IMAGES,
        manifest=layout.MANIFEST,
        classifier=layout.CLASSIFIER,
    output:
        layout.REFERENCE,
    log:
        layout.log("reference-{protocol}", layout.DATA),
    benchmark:
        layout.benchmark("reference-{protocol}", layout.DATA)
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=1500,
        runtime=60,
        gpu=0,
    params:
        digest=of_dataset,
    shell:
        "ebdiff reference-stats {wildcards.dataset:q} --threads {threads} > {log:q} 2>&1"
