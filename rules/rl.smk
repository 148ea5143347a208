# Reinforcement learning: states of trajectories.


use rule pretrain as rl with:
    output:
        "<store>/rl/{label}-{id}/at-{n}/artifact.json",
    log:
        "<logs>/rl/{label}-{id}.at-{n}.log",
