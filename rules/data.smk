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
    localrule: True  # it may need the network, which compute nodes often lack
    conda:
        CONDA
    threads: 2
    resources:
        mem_mb=1500,
        runtime=60,
        gpu=0,
    params:
        digest=of_dataset,
    shell:
        "ebdiff prepare-data {wildcards.dataset:q} --threads {threads} > {log:q} 2>&1"


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
        mem_mb=grow(1500),
        runtime=grow(60),
        gpu=0,
    params:
        digest=of_dataset,
    shell:
        "ebdiff train-classifier {wildcards.dataset:q} --threads {threads} > {log:q} 2>&1"


rule reference_stats:
    input:
        lambda w: inputs.reference(w.dataset, w.protocol),
    output:
        statistics=layout.REFERENCE,
        features=layout.REFERENCE_FEATURES,
    log:
        layout.log("reference-{protocol}-{number}", layout.DATA),
    benchmark:
        layout.benchmark("reference-{protocol}-{number}", layout.DATA)
    conda:
        CONDA
    threads: compute_reference("threads")
    resources:
        mem_mb=grow("mem_mb", of=compute_reference),
        runtime=grow("runtime", of=compute_reference),
        gpu=lambda w: (
            0 if w.protocol == "classifier" else min(1, compute_reference("gpus")(w))
        ),
    params:
        digest=of_reference,
    shell:
        "ebdiff reference-stats {wildcards.dataset:q} --protocol {wildcards.protocol}"
        " --images {wildcards.number} --threads {threads} > {log:q} 2>&1"
