# States as Hugging Face checkpoints.


rule hf_export:
    input:
        upstream,
    output:
        "<store>/hf_export/{label}-{id}/artifact.json",
    log:
        "<logs>/hf_export/{label}-{id}.log",
    resources:
        **MODEL_JOB,
    message:
        "{resources.title}"
    shell:
        job("hf_export")
