"""What importing the pack brings into a host's process beside itself. Runs in the host's own Python, in its folder."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def main(pack: Path) -> None:
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    importlib.import_module("utils.extra_config")  # first, as in the host's main module: another 'utils' may come
    for name in ("server", "execution", "nodes"):
        importlib.import_module(name)
    before = set(sys.modules)
    name = "the_pack"
    spec = importlib.util.spec_from_file_location(name, pack / "__init__.py", submodule_search_locations=[str(pack)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    new = set(sys.modules) - before
    own = {known for known in new if known == name or known.startswith(f"{name}.")}
    print(json.dumps({"own": len(own), "others": sorted(new - own)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
