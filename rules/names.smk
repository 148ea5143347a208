# Names are views: links to what today's recipe says. The session drops a link that shows something else, so that
# exactly the link is made again.


rule name:
    input:
        named,
    output:
        directory("{view}/{name}"),
    log:
        "<logs>/names/{view}/{name}.log",
    wildcard_constraints:
        view="|".join(set(VIEWS) - {"report"}),
    localrule: True
    params:
        links=links,
    message:
        "{output}"
    shell:
        program("name.py", "{output:q} {params.links:q} 2> {log:q}")
