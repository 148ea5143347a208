# nemoflow: from raw text to a Hugging Face checkpoint. `snakemake` alone prints the targets.
#
# Paths:
#   {kind}/{recipe}[@{stage}][:{n}]                          a name: link to today's artifact
#       kind: tokenizer, data, import, average, select, pretrain, sft, rl, hf_export, eval, report; seal: a state's digests
#   <store>/{kind}/{label}-{id}/artifact.json                an artifact; complete when this file exists
#   <store>/{kind}/{label}-{id}/at-{n}/artifact.json         state n of a training (kind: pretrain, sft, rl)
#   <store>/{kind}/{label}-{id}/at-{n}/digests.json          digests of all files of that state
#   <store>/.stages/{id}.json                                a frozen stage: what an artifact is defined by
#   <logs>/{kind}/{label}-{id}[.at-{n}].log                  end of the newest attempt's log

from snakemake.utils import min_version

min_version("9.27")


configfile: workflow.source_path("config/config.yaml")


pathvars:
    store="artifacts",


include: "rules/common.smk"
include: "rules/slurm.smk"


rule help:
    localrule: True
    message:
        "targets"
    shell:
        program("help.py", *(shlex.quote(str(path)) for path in RECIPES))


include: "rules/data.smk"
include: "rules/pretrain.smk"
include: "rules/sft.smk"
include: "rules/rl.smk"
include: "rules/models.smk"
include: "rules/export.smk"
include: "rules/eval.smk"
include: "rules/report.smk"
include: "rules/names.smk"
