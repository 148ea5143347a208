# What people look at after a training: curves, tokens, throughput, costs, scores and answers of an export and of all
# it comes from. A name like others, a directory with links to what it tells of; `--report FILE` puts it into one page.


report: "captions/workflow.rst"


rule report:
    input:
        named,
    output:
        report(
            directory("{view}/{name}"),
            patterns=["{picture}.svg", "{picture}.html"],
            caption="captions/picture.rst",
            category=lambda wildcards: PICTURES[wildcards.picture].category,
            labels=lambda wildcards: {"recipe": wildcards.name, "shows": PICTURES[wildcards.picture].title},
        ),
    log:
        "<logs>/names/{view}/{name}.log",
    wildcard_constraints:
        view="report",
    localrule: True
    params:
        links=links,
    message:
        "{output}"
    shell:
        program("report.py", "{output:q} {params.links:q} 2> {log:q}")
