# Reinforcement learning: states of trajectories.


rule rl:
    input:
        upstream,
    output:
        "<store>/rl/{label}-{id}/at-{n}/artifact.json",
    log:
        "<logs>/rl/{label}-{id}.at-{n}.log",
    threads: workflow.cores
    resources:
        **MODEL_JOB,
    message:
        "{resources.title}"
    shell:
        job("rl", "--at {wildcards.n}")
