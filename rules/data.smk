# Raw text to what training reads.


rule source:
    input:
        upstream,
    output:
        "<store>/source/{label}-{id}/artifact.json",
    log:
        "<logs>/source/{label}-{id}.log",
    resources:
        title=title,
    message:
        "{resources.title}"
    shell:
        job("source")


rule tokenizer:
    input:
        upstream,
    output:
        "<store>/tokenizer/{label}-{id}/artifact.json",
    log:
        "<logs>/tokenizer/{label}-{id}.log",
    resources:
        title=title,
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
    resources:
        title=title,
    message:
        "{resources.title}"
    shell:
        job("shards")


rule blend:
    input:
        upstream,
    output:
        "<store>/blend/{label}-{id}/artifact.json",
    log:
        "<logs>/blend/{label}-{id}.log",
    resources:
        title=title,
    message:
        "{resources.title}"
    shell:
        job("blend")


rule chats:
    input:
        upstream,
    output:
        "<store>/chats/{label}-{id}/artifact.json",
    log:
        "<logs>/chats/{label}-{id}.log",
    resources:
        title=title,
    message:
        "{resources.title}"
    shell:
        job("chats")


rule prompts:
    input:
        upstream,
    output:
        "<store>/prompts/{label}-{id}/artifact.json",
    log:
        "<logs>/prompts/{label}-{id}.log",
    resources:
        title=title,
    message:
        "{resources.title}"
    shell:
        job("prompts")
