# Tables, figures and the page. None of these verbs imports torch: no job of a cluster is worth their seconds.


rule write_table:
    input:
        report_inputs,
    output:
        csv=final(layout.TABLE, "csv"),
        md=report(
            final(layout.TABLE, "md"), category="{experiment}", subcategory="tables"
        ),
        tex=final(layout.TABLE, "tex"),
    log:
        layout.log("{table}"),
    benchmark:
        layout.benchmark("{table}")
    localrule: True
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
        gpu=0,
    params:
        digest=of(digests.report_digest),
    shell:
        "ebdiff table {wildcards.experiment:q} {wildcards.table} --final > {log:q} 2>&1"


rule draw_figure:
    input:
        report_inputs,
    output:
        pdf=final(layout.FIGURE, "pdf"),
        png=report(
            final(layout.FIGURE, "png"), category="{experiment}", subcategory="figures"
        ),
    log:
        layout.log("{figure}"),
    benchmark:
        layout.benchmark("{figure}")
    localrule: True
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=800,
        runtime=10,
        gpu=0,
    params:
        digest=of(digests.report_digest),
    shell:
        "ebdiff figure {wildcards.experiment:q} {wildcards.figure} --final > {log:q} 2>&1"


rule write_report:
    input:
        report_inputs,
        lambda w: tables_of(w.experiment),
        lambda w: figures_of(w.experiment),
    output:
        report(layout.REPORT, category="{experiment}"),
    log:
        layout.log("report"),
    benchmark:
        layout.benchmark("report")
    localrule: True
    conda:
        CONDA
    threads: 1
    resources:
        mem_mb=800,
        runtime=10,
        gpu=0,
    params:
        digest=of(digests.report_digest),
    shell:
        "ebdiff report {wildcards.experiment:q} > {log:q} 2>&1"


rule:
    name:
        "so-far"
    log:
        layout.log("so-far", "results"),
    benchmark:
        layout.benchmark("so-far", "results")
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
