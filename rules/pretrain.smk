# Pretraining: states of trajectories.


rule pretrain:
    input:
        upstream,
    output:
        "<store>/pretrain/{label}-{id}/at-{n}/artifact.json",
    log:
        "<logs>/pretrain/{label}-{id}.at-{n}.log",
    threads: workflow.cores
    resources:
        **MODEL_JOB,
    message:
        "{resources.title}"
    shell:
        job("pretrain", "--at {wildcards.n}")
