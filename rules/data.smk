# Raw text to what training reads. Each rule runs the script of its name.


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
        "{SCRIPTS}/{rule}.py --stage {STORE:q}/.stages/{wildcards.id}.json --log {log:q}"


use rule source as tokenizer with:
    output:
        "<store>/tokenizer/{label}-{id}/artifact.json",
    log:
        "<logs>/tokenizer/{label}-{id}.log",


use rule source as shards with:
    output:
        "<store>/shards/{label}-{id}/artifact.json",
    log:
        "<logs>/shards/{label}-{id}.log",


use rule source as blend with:
    output:
        "<store>/blend/{label}-{id}/artifact.json",
    log:
        "<logs>/blend/{label}-{id}.log",


use rule source as chats with:
    output:
        "<store>/chats/{label}-{id}/artifact.json",
    log:
        "<logs>/chats/{label}-{id}.log",


use rule source as prompts with:
    output:
        "<store>/prompts/{label}-{id}/artifact.json",
    log:
        "<logs>/prompts/{label}-{id}.log",
