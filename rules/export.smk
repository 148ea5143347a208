# States as Hugging Face checkpoints.


use rule source as hf_export with:
    output:
        "<store>/hf_export/{label}-{id}/artifact.json",
    log:
        "<logs>/hf_export/{label}-{id}.log",
