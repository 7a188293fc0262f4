"""Entry of a Hugging Face Space: the same page as `python run_local.py app`, from a copy of this repository."""

import os
from pathlib import Path

from ssm_metarl.app.server import serve

if __name__ == "__main__":
    # A Space sets them; elsewhere the page stays on this machine.
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    serve(host, port, Path("runs"), None, print, names=[os.environ.get("SPACE_HOST", "localhost")])
