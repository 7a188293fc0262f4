"""`python -m ssm_metarl` is the command line."""

from ssm_metarl.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
