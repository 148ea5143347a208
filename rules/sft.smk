# Supervised fine-tuning: states of trajectories.


use rule pretrain as sft with:
    output:
        "<store>/sft/{label}-{id}/at-{n}/artifact.json",
    log:
        "<logs>/sft/{label}-{id}.at-{n}.log",
