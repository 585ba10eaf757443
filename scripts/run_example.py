"""Run examples/batch_norm_on_cifar10.ipynb afresh and keep its outputs in the file.

    python scripts/run_example.py    # needs pip install '.[learn]' and CIFAR-10

It runs in a temporary folder, so that no run or study is left beside the notebook and no path of
this machine gets into its outputs.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLE = Path(__file__).parents[1] / "examples" / "batch_norm_on_cifar10.ipynb"


def execute(folder: Path, **parameters: Any) -> nbformat.NotebookNode:
    """Run every cell in `folder`, with `parameters` in the place of the first cell's.

    Settings and connection files of Jupyter and IPython go into `folder`, too.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(EXAMPLE, as_version=4)
    if parameters:
        [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    private = {
        name: str(folder / name.lower())
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    client = NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    before = {name: os.environ.get(name) for name in private}
    os.environ.update(private)
    try:
        client.execute()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    notebook.metadata["language_info"] = {"name": "python"}  # without this machine's version
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(Path(folder))
    nbformat.write(notebook, EXAMPLE)
    print(f"{EXAMPLE}: {EXAMPLE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
