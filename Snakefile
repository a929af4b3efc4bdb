import time
from pathlib import Path

from snakemake.utils import min_version

min_version("9.6")


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/latents.smk"
include: "rules/dense.smk"
include: "rules/tickets.smk"
include: "rules/experts.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"


started = time.time()


onsuccess:
    for page in sorted(Path("results").glob("*/**/report.html")):
        if page.stat().st_mtime >= started:
            logger.info(f"Open {page}")


localrules:
    all,
    smoke,
    tables,
    figures,
    report,
    paper,


rule all:
    default_target: True
    input:
        of_all(reports_of),


rule report:
    input:
        of_all(reports_of),


rule paper:
    input:
        of_all(reports_of),


rule smoke:
    input:
        lambda w: reports_of("smoke"),


rule tables:
    input:
        of_all(lambda name: those_of(name, "tables")),


rule figures:
    input:
        of_all(lambda name: those_of(name, "figures")),
