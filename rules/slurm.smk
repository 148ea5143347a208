# Only where jobs go to Slurm: what is asked before each submission, what becomes of a job, and what is not logged.

# Under --verbose the plugin logs the whole environment of a job, tokens and all
logger.addFilter(lambda record: not str(record.msg).startswith("environment: "))

if workflow.is_main_process and launcher() == "slurm":
    from nemoflow import gate
    from nemoflow.store import Store

    clearly(gate.install, Store(STORE), lambda job: job.resources.get("title", job.name), logger.info)

    # The gate says these in human names, or they are no news
    logger.addFilter(
        lambda record: not re.match(
            r"Job \d+ has been submitted|No SLURM account|No account was given|Unable to guess SLURM|No job memory"
            r"|No wall time|SLURM run ID|\nUnable to guess",
            str(record.msg),
        )
    )
