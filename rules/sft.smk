# Supervised fine-tuning: states of trajectories.


rule sft:
    input:
        upstream,
    output:
        "<store>/sft/{label}-{id}/at-{n}/artifact.json",
    log:
        "<logs>/sft/{label}-{id}.at-{n}.log",
    threads: workflow.cores
    resources:
        **MODEL_JOB,
    message:
        "{resources.title}"
    shell:
        job("sft", "--at {wildcards.n}")
