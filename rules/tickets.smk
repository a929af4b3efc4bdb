# Masks of every interval, their distances, and the networks cut out.


rule prune_per_epoch:
    input:
        of(inputs.masks, "search", "criterion", "weights", "seed"),
    output:
        masks=layout.MASKS,
        ledger=layout.MASKS_LEDGER,
    log:
        layout.log("seed{seed}/prune-per-epoch.{search}.{criterion}.{weights}"),
    benchmark:
        layout.benchmark("seed{seed}/prune-per-epoch.{search}.{criterion}.{weights}")
    priority: 40
    conda:
        CONDA
    threads: compute("threads")
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow("runtime"),
        gpu=lambda w: (
            0 if inputs.taken_while_training(w.search, w.criterion) else one_gpu(w)
        ),
    params:
        digest=of(digests.masks_digest, "search", "criterion", "weights"),
    shell:
        "ebdiff prune-per-epoch {wildcards.experiment:q} --search {wildcards.search:q}"
        " --criterion {wildcards.criterion} --weights {wildcards.weights} --seed {wildcards.seed}"
        " --threads {threads} > {log:q} 2>&1"


rule hamming_matrix:
    input:
        images,
        masks=layout.MASKS,
    output:
        layout.HAMMING,
    log:
        layout.log("seed{seed}/hamming-matrix.{search}.{criterion}.{weights}"),
    benchmark:
        layout.benchmark("seed{seed}/hamming-matrix.{search}.{criterion}.{weights}")
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=grow(800),
        runtime=grow(10),
        gpu=0,
    params:
        digest=of(digests.hamming_digest, "search", "criterion", "weights"),
    shell:
        "ebdiff hamming-matrix {wildcards.experiment:q} --search {wildcards.search:q}"
        " --criterion {wildcards.criterion} --weights {wildcards.weights} --seed {wildcards.seed}"
        " > {log:q} 2>&1"


rule select_eb_epoch:
    input:
        of(inputs.ticket, "search", "criterion", "weights", "rate", "seed"),
    output:
        ticket=layout.TICKET,
        story=layout.STORY,
    log:
        layout.log("seed{seed}/select-eb-epoch.{search}.{criterion}.{weights}.{rate}"),
    benchmark:
        layout.benchmark(
            "seed{seed}/select-eb-epoch.{search}.{criterion}.{weights}.{rate}"
        )
    priority: 40
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=grow("mem_mb"),
        runtime=grow(10),
        gpu=0,
    params:
        digest=of(digests.ticket_digest, "search", "criterion", "weights", "rate"),
    shell:
        "ebdiff select-eb-epoch {wildcards.experiment:q} --search {wildcards.search:q}"
        " --criterion {wildcards.criterion} --weights {wildcards.weights} --rate {wildcards.rate}"
        " --seed {wildcards.seed} > {log:q} 2>&1"
