# Models that are not trained: imported, averaged or selected. And digests of trained states, for who wants to check them later.


rule hf_import:
    input:
        upstream,
    output:
        "<store>/import/{label}-{id}/artifact.json",
    log:
        "<logs>/import/{label}-{id}.log",
    resources:
        **MODEL_JOB,
    message:
        "{resources.title}"
    shell:
        job("hf_import")


rule average:
    input:
        upstream,
    output:
        "<store>/average/{label}-{id}/artifact.json",
    log:
        "<logs>/average/{label}-{id}.log",
    resources:
        **MODEL_JOB,
    message:
        "{resources.title}"
    shell:
        job("average")


rule select_state:
    input:
        upstream,
    output:
        "<store>/select/{label}-{id}/artifact.json",
    log:
        "<logs>/select/{label}-{id}.log",
    localrule: True
    resources:
        **DATA_JOB,
    message:
        "{resources.title}"
    shell:
        job("select_state")


rule seal:
    input:
        state,
    output:
        "<store>/{kind}/{label}-{id}/at-{n}/digests.json",
    log:
        "<logs>/seal/{kind}/{label}-{id}.at-{n}.log",
    threads: 8
    resources:
        **DATA_JOB,
    message:
        "digests of {resources.title}"
    shell:
        program("seal.py", "--threads {threads} --log {log:q} {output:q}")
