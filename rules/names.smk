# Names are views: links to what today's recipe says. The session drops a link that shows something else, so that
# exactly the link is made again.


def named(wildcards):
    """The artifacts that a name shows."""
    begin()
    name = f"{wildcards.view}/{wildcards.name}"
    return (
        [ancient(target.artifact) for target in session.names[name].values()]
        if name in session.names
        else []
    )


def links(wildcards):
    """The links a name consists of, as arguments."""
    return [
        f"{sub}={text}"
        for sub, text in session.links(f"{wildcards.view}/{wildcards.name}").items()
    ]


localrules:
    name,


rule name:
    input:
        named,
    output:
        directory("{view}/{name}"),
    log:
        "<logs>/names/{view}/{name}.log",
    params:
        links=links,
    message:
        "{output}"
    shell:
        "{SCRIPTS}/name.py {output:q} {params.links:q} 2> {log:q}"
