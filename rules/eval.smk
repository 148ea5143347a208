# Exports asked the questions of tasks.


rule eval:
    input:
        upstream,
    output:
        "<store>/eval/{label}-{id}/artifact.json",
    log:
        "<logs>/eval/{label}-{id}.log",
    threads: workflow.cores
    resources:
        **MODEL_JOB,
    message:
        "{resources.title}"
    shell:
        job("eval")
