# Tables, figures and the page. None of these verbs imports torch: no job of a cluster is worth their seconds.


# A rule for each experiment, because which tables there are is its own business.
for name in loading.names():
    try:
        pages = pages_of(name)
    except SystemExit:  # a broken file is reported when it is asked for
        continue

    rule:
        name:
            f"tabulate_{name}"
        input:
            lambda w, name=name: reads("tabulate")(SimpleNamespace(experiment=name)),
        output:
            pages,
        log:
            log_of("tabulate").format(experiment=name),
        benchmark:
            benchmark_of("tabulate").format(experiment=name)
        localrule: True
        conda:
            CONDA
        threads: 1
        resources:
            mem_mb=800,
            runtime=10,
            gpu=0,
        params:
            digest=lambda w, name=name: digest("tabulate")(
                SimpleNamespace(experiment=name)
            ),
            experiment=name,
        shell:
            "ebdiff tabulate {params.experiment:q} > {log:q} 2>&1"


rule write_report:
    input:
        reads("report"),
    output:
        report(layout.REPORT, category="{experiment}"),
    log:
        log_of("report"),
    benchmark:
        benchmark_of("report")
    priority: priority_of("report")
    localrule: True
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=800,
        runtime=10,
        gpu=0,
    params:
        digest=digest("report"),
    shell:
        "ebdiff report {wildcards.experiment:q} > {log:q} 2>&1"


if RUNS:

    rule report_of_runs:
        input:
            lambda w: metrics_of(w.experiment, RUNS),
        output:
            layout.SO_FAR_REPORT,
        log:
            "results/{experiment}/logs/report-of-runs.log",
        benchmark:
            "results/{experiment}/benchmarks/report-of-runs.tsv"
        localrule: True
        conda:
            CONDA
        threads: 1
        resources:
            mem_mb=800,
            runtime=10,
            gpu=0,
        shell:
            "ebdiff report {wildcards.experiment:q} --so-far > {log:q} 2>&1"


rule:
    name:
        "so-far"
    log:
        "results/logs/so-far.log",
    benchmark:
        "results/benchmarks/so-far.tsv"
    localrule: True
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=800,
        runtime=10,
        gpu=0,
    params:
        experiments=chosen,
    shell:
        "bash -ec 'for name; do ebdiff report \"$name\" --so-far; done' so-far {params.experiments:q}"
        " 2>&1 | tee {log:q}"
