# Raw text to what training reads.


# Downloads need the network, which compute nodes often lack, and generated texts this very interpreter: a local rule,
# unless the configuration says otherwise.


rule source:
    input:
        upstream,
    output:
        "<store>/source/{label}-{id}/artifact.json",
    log:
        "<logs>/source/{label}-{id}.log",
    localrule: config["download"]["local"]
    resources:
        **DATA_JOB,
    message:
        "{resources.title}"
    shell:
        job("source", f"--threads {config['download']['connections']}")


rule tokenizer:
    input:
        upstream,
    output:
        "<store>/tokenizer/{label}-{id}/artifact.json",
    log:
        "<logs>/tokenizer/{label}-{id}.log",
    localrule: config["download"]["local"]
    resources:
        **DATA_JOB,
    message:
        "{resources.title}"
    shell:
        job("tokenizer")


rule shards:
    input:
        upstream,
    output:
        "<store>/shards/{label}-{id}/artifact.json",
    log:
        "<logs>/shards/{label}-{id}.log",
    threads: 8
    resources:
        **DATA_JOB,
    message:
        "{resources.title}"
    shell:
        job("shards", "--threads {threads}")


rule merge:
    input:
        upstream,
    output:
        "<store>/merge/{label}-{id}/artifact.json",
    log:
        "<logs>/merge/{label}-{id}.log",
    threads: 4
    resources:
        **DATA_JOB,
    message:
        "{resources.title}"
    shell:
        job("merge", "--threads {threads}")


rule blend:
    input:
        upstream,
    output:
        "<store>/blend/{label}-{id}/artifact.json",
    log:
        "<logs>/blend/{label}-{id}.log",
    resources:
        **DATA_JOB,
    message:
        "{resources.title}"
    shell:
        job("blend")


rule index:
    input:
        upstream,
    output:
        "<store>/index/{label}-{id}/artifact.json",
    log:
        "<logs>/index/{label}-{id}.log",
    resources:
        **MODEL_JOB,
    message:
        "{resources.title}"
    shell:
        job("index")


rule chats:
    input:
        upstream,
    output:
        "<store>/chats/{label}-{id}/artifact.json",
    log:
        "<logs>/chats/{label}-{id}.log",
    threads: 8
    resources:
        **DATA_JOB,
    message:
        "{resources.title}"
    shell:
        job("chats", "--threads {threads}")


rule prompts:
    input:
        upstream,
    output:
        "<store>/prompts/{label}-{id}/artifact.json",
    log:
        "<logs>/prompts/{label}-{id}.log",
    resources:
        **DATA_JOB,
    message:
        "{resources.title}"
    shell:
        job("prompts")


rule preferences:
    input:
        upstream,
    output:
        "<store>/preferences/{label}-{id}/artifact.json",
    log:
        "<logs>/preferences/{label}-{id}.log",
    resources:
        **DATA_JOB,
    message:
        "{resources.title}"
    shell:
        job("preferences")
