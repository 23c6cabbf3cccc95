"""Takes the chapter `runs` apart, so that a stage depends on what it uses; run once, after move_to_rooms.py."""

import json
import re
from pathlib import Path

NBS = Path("nbs")


class Chapter:
    def __init__(self, name: str, title: str = "", subtitle: str = "", module: str = "", imports: str = "", tests: str = "", intro: str = ""):
        self.path = NBS / f"{name}.ipynb"
        if not title:
            self.book = json.loads(self.path.read_text())
            return
        self.book = {"cells": [], "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
        self.add("markdown", "title", f"# {title}\n> {subtitle}")
        self.add("code", "module", f"#| default_exp {module}")
        if intro:
            self.add("markdown", "intro", intro)
        self.add("code", "imports", "#| export\n" + imports.strip())
        if tests:
            self.add("code", "test-imports", "#| hide\n" + tests.strip())

    def add(self, kind: str, id: str, text: str) -> None:
        cell = {"cell_type": kind, "id": id, "metadata": {}, "source": text}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        self.book["cells"].append(cell)

    def index(self, id: str) -> int:
        return next(n for n, cell in enumerate(self.book["cells"]) if cell["id"] == id)

    def text(self, id: str) -> str:
        return "".join(self.book["cells"][self.index(id)]["source"])

    def set(self, id: str, text: str) -> None:
        self.book["cells"][self.index(id)]["source"] = text

    def sub(self, id: str, *pairs) -> None:
        text = self.text(id)
        for old, new in pairs:
            assert text.count(old) == 1, (self.path, id, old, text.count(old))
            text = text.replace(old, new)
        self.set(id, text)

    def cut(self, *ids: str) -> list[dict]:
        found = [self.book["cells"][self.index(id)] for id in ids]
        self.book["cells"] = [cell for cell in self.book["cells"] if cell["id"] not in ids]
        return found

    def put(self, cells: list[dict], after: str | None = None) -> None:
        at = len(self.book["cells"]) if after is None else self.index(after) + 1
        self.book["cells"][at:at] = cells

    def save(self) -> None:
        self.path.parent.mkdir(exist_ok=True, parents=True)
        self.path.write_text(json.dumps(self.book, indent=1, ensure_ascii=False) + "\n")


def function(text: str, name: str) -> tuple[str, str]:
    "A function's source, and the text without it"
    match = re.search(rf"(?:^|\n\n)((?:def|class) {name}\b.*?)(?=\n\n\n(?:def|class|@|[A-Z_]+ =)|\Z)", text, re.S)
    return match[1].strip("\n"), (text[: match.start()] + text[match.end() :]).rstrip("\n")


runs, core = Chapter("study/30_runs"), Chapter("00_core")

# ---- core: a pool of processes
pool = runs.cut("stop-workers-why", "stop-workers")
core_last = [cell["id"] for cell in core.book["cells"] if "def for_all(" in "".join(cell["source"])][0]
after = core.book["cells"][core.index(core_last) + 1 :]
lesson = next((cell["id"] for cell in after if cell["cell_type"] == "code"), core_last)
core.put(pool, lesson)
core.save()

# ---- preprocess: several data sets
prepare = runs.cut("prepare-all")
preprocess = Chapter("data/40_preprocess")
preprocess.add("markdown", "prepare-all-why", "A corpus is several data sets. All are tried before an error names the cases that are unfit, so that one report is enough.")
preprocess.put(prepare)
text = preprocess.text("prepare-all").replace("    from mednext_v2.data.preprocess import prepare\n    from mednext_v2.data.datasets import get_task\n\n", "")
text = re.sub(r"\n\n\ndef pretrained_folder.*", "", text, flags=re.S)
preprocess.set("prepare-all", text)
pretrained = '''def pretrained_folder(profile: str, init: str, backbone: str) -> Path | None:
    "The model folder that fine-tuning starts from; None from scratch"
    return None if init == "scratch" else root() / "models" / profile / "pretrain" / init / backbone / f"{init}-s0"'''
imports = preprocess.text("imports")
imports = imports.replace("Task, count_folds, join_labels,", "Task, count_folds, get_task, join_labels,")
assert imports.count("sha256,") == 1
imports = imports.replace("sha256,", "sha256, stop_workers,")
preprocess.set("imports", imports)
preprocess.save()

# ---- study.plan
plan = Chapter(
    "study/20_plan", "plan", "What `params.yaml` says is to be run, and whether it can be", "study.plan",
    "from dataclasses import dataclass\n\nfrom mednext_v2.core import build, params",
    "from fastcore.test import expect_fail, test_eq",
)
plan.put(runs.cut("plan-heading", "plan-why", "plan", "read-plan", "plan-lesson"))
text = plan.text("plan")
start, end = text.index("    def __post_init__"), text.index("    def folds_of")
check = text[start:end]
text = text[:start] + '''    def __post_init__(self):
        if not set(self.folds) <= set(range(5)) or not self.folds:
            raise ValueError(f"params.yaml: axes.folds must be some of 0 to 4, got {', '.join(map(str, self.folds)) or 'none'}")

''' + text[end:]
plan.set("plan", text.replace('"What a profile runs: the axes of the experiment, each name checked when the plan is made"', '"What a profile runs: the axes of the experiment"'))
plan.set("plan-why", "`Plan` is everything that `params.yaml` says about *what* is run. A stage reads it, and asks whether it holds what the stage was started for; whether the names exist is checked when `params.yaml` is composed ([stages](../70_stages.ipynb)).")
plan.set("plan-lesson", '''profile = params("profile")
plan = read_plan(profile, backbone="unet", init="scratch")
with expect_fail(ValueError, contains="backbone 'resnet' is not in params.yaml"):
    read_plan(profile, backbone="resnet")
with expect_fail(ValueError, contains="axes.folds must be some of 0 to 4"):
    Plan("mini", ("corpus_ct",), ("unet",), ("scratch",), ("brain_mr",), (0,), folds=(5,))
test_eq(plan.folds_of("brain_mr"), (0,))
plan.backbones, plan.inits''')
plan.save()

# ---- stages: notebooks, profiles, README
stages = Chapter(
    "70_stages", "stages", "What `dvc.yaml` and the Makefile call: run a stage notebook, compose `params.yaml`, write the README", "stages",
    "import re\nimport sys\nfrom pathlib import Path\n\nfrom mednext_v2.core import atomic_file, build, params, read_json, read_yaml, root\nfrom mednext_v2.study.plan import Plan",
    "import tempfile\n\nimport nbformat\nfrom fastcore.test import expect_fail, test_eq",
    runs.text("intro"),
)
stages.put(runs.cut("run-heading", "run-why", "notebook-parameters", "run-lesson", "stage-heading", "stage-why", "run-stage", "run-stage-lesson",
                    "profile-heading", "profile-why", "profiles", "profiles-lesson", "readme-heading", "readme-why", "readme", "readme-lesson"))
stages.sub("profile-why", ("The committed `params.yaml` is the profile `mini`.", "The committed `params.yaml` is the profile `mini`. A misspelt data set should fail in the first second and not after the pretraining, so every name is checked before the file is written."))
check = check.replace("    def __post_init__(self):\n", '''def check_plan(plan: Plan) -> None:
    "ValueError for a data set, network or start in `params.yaml` that is not known"
''')
check = "\n".join(line[4:] if line.startswith("        ") else line for line in check.splitlines()).replace("self", "plan")
check = check[: check.index("    if not set(plan.folds)")].rstrip()
check = check.replace('f"params.yaml: axes.{axis} names {name!r}, which is not known; known: {\', \'.join(known)}"', 'f"params.yaml: axes.{axis} names {name!r}, which is not known; known: {\', \'.join(known)}"')
text = stages.text("profiles")
at = text.index("def compose_params(")
text = text[:at] + check + "\n\n\n" + text[at:]
text = text.replace("        check_names(read_yaml(temporary))\n", '''        values = read_yaml(temporary)
        check_names(values)
        check_plan(build(Plan, {"profile": profile, "seeds": values["seeds"], **values["axes"]}, "params.yaml:axes"))
''')
stages.set("profiles", text)
stages.set("profiles-lesson", '''with expect_fail(ValueError, contains="axes.backbones names 'unett'"):
    check_plan(Plan("mini", ("corpus_ct",), ("unett",), ("scratch",), ("brain_mr",), (0,)))
with expect_fail(ValueError, contains="axes.inits names 'corpus_mr', which is not known; known: scratch, corpus_ct"):
    check_plan(Plan("mini", ("corpus_ct",), ("unet",), ("corpus_mr",), ("brain_mr",), (0,)))
''' + stages.text("profiles-lesson"))
text = stages.text("readme")
old = """.replace("](../", "](").replace('("../', '("')"""
assert text.count(old) == 1
stages.set("readme", text.replace(old, "").replace('    return "<!--', """    text = re.sub(r"\\]\\((?!\\w+:|#|\\.\\./)", "](nbs/", text).replace("](../", "](").replace('("../', '("')
    return "<!--"""))
stages.sub("readme-lesson", ("[nbformat", "[nbformat") if False else ("# title\\n![scan](../results/scan.png)", "# title\\n![scan](../results/scan.png) [claims](report/claims.ipynb)"), ('assert "](results/scan.png)" in text', 'assert "](results/scan.png)" in text and "](nbs/report/claims.ipynb)" in text'))
stages.save()

# ---- scoring.evaluate, scoring.released, evaluation.cases
finetuning = Chapter("60_finetuning")
cases = Chapter(
    "evaluation/40_cases", "cases", "Label the held-out scans of a data set and score them, on their own grids", "evaluation.cases",
    "from pathlib import Path\n\nimport pandas as pd\n\nfrom mednext_v2.core import ItemsFailed, attempt, for_all, held, write_csv, write_json\nfrom mednext_v2.data.datasets import partial_cases\nfrom mednext_v2.evaluation.metrics import score_files, summarise\nfrom mednext_v2.evaluation.statistics import means\nfrom mednext_v2.inference.files import Job, Wish, label_job, read_job, write_job\nfrom mednext_v2.inference.predictor import Options, load_members\nfrom mednext_v2.models.card import add_scores",
    intro="`finetune` and the stages of the study score a model in the same way: it labels the raw scan on the scan's own grid, and the raw label map is the truth. What resampling costs is part of a score, as it is of a published one.",
)
cases.put(finetuning.cut("predict-cases"))
text = cases.text("predict-cases")
text = re.sub(r"    from mednext_v2\.(?:evaluation|data|inference|models)\.\w+ import .*\n", "", text)
text = re.sub(r'(    "[^\n]*"\n)\n+(?=    )', r"\1", text)
cases.set("predict-cases", text)
cases.save()
finetuning.set("imports", finetuning.text("imports").replace(
    "from mednext_v2.core import ItemsFailed, attempt, check_output, fingerprint_of, for_all, held, read_csv, read_json, write_csv, write_json",
    "from mednext_v2.core import check_output, fingerprint_of, held, read_csv, read_json, write_json").replace(
    "from mednext_v2.training.run import", "from mednext_v2.evaluation.cases import note_scores, predict_cases, score_cases, write_scores\nfrom mednext_v2.training.run import"))
finetuning.cut("score-heading")
finetuning.save()

evaluate = Chapter(
    "scoring/10_evaluate", "evaluate", "Label and score the test scans of many models, side by side", "scoring.evaluate",
    "from pathlib import Path\n\nimport pandas as pd\n\nfrom mednext_v2.core import in_pool, write_csv\nfrom mednext_v2.data.datasets import list_cases\nfrom mednext_v2.data.preprocess import Prepared\nfrom mednext_v2.evaluation.cases import predict_cases, score_cases\nfrom mednext_v2.models.card import read_card\nfrom mednext_v2.study.runs import Run, run_data",
)
evaluate.put(runs.cut("evaluate-heading", "evaluate-why", "evaluate-one", "evaluate-runs"))
text = evaluate.text("evaluate-one")
text = re.sub(r"    from mednext_v2\..* import .*\n", "", text)
text = text.replace("    import torch\n\n\n", "    import torch\n\n").replace('says so"\n\n    known', 'says so"\n    known')
text = re.sub(r'(    "[^\n]*"\n)\n+(?=    known)', r"\1", text)
evaluate.set("evaluate-one", text)
evaluate.save()

released = Chapter(
    "scoring/20_released", "released", "Public pretrained models, fine-tuned and scored as our own", "scoring.released",
    "from pathlib import Path\n\nimport pandas as pd\n\nfrom mednext_v2.finetuning import parent_folder\nfrom mednext_v2.models.card import read_card\nfrom mednext_v2.scoring.evaluate import evaluate_runs\nfrom mednext_v2.study.plan import Plan\nfrom mednext_v2.study.runs import finetuning_runs, train_runs\nfrom mednext_v2.zoo.catalogue import RECEIPT, cache_folder",
)
released.put(runs.cut("released-why", "released"))
text = re.sub(r"    from mednext_v2\..* import .*\n", "", released.text("released"))
released.set("released", re.sub(r'(    "[^\n]*"\n)\n+(?=    )', r"\1", text))
released.save()

# ---- scoring.features
ablations, analysis = Chapter("scoring/30_ablations"), Chapter("report/20_analysis")
features = Chapter(
    "scoring/40_features", "features", "How alike a network's channels are, and how that changes while it trains", "scoring.features",
    "from collections.abc import Callable\nfrom pathlib import Path\n\nimport numpy as np\nimport pandas as pd\nimport torch\nfrom safetensors.torch import load_file\nfrom torch import nn\nfrom torch.nn import functional as F\n\nfrom mednext_v2.data.preprocess import Prepared\nfrom mednext_v2.inference.predictor import evaluating\nfrom mednext_v2.models.registry import load_model\nfrom mednext_v2.network.blocks import MedNeXtBlock",
    "from fastcore.test import expect_fail, test_close, test_eq",
)
features.put(analysis.cut(
    "power-law-text", "power-law-text-2", "feature-statistics", "feature-statistics-text", "feature-statistics-demo", "feature-statistics-text-2",
    "network-features", "network-features-demo", "channel-maps-text", "channel-maps", "channel-maps-demo"))
features.put(ablations.cut("places-text", "places-text-2", "snapshot-features"))
features.sub("places-text-2", (" [analysis](../report/20_analysis.html) says what is measured.", ""))
for id in ("network-features", "snapshot-features", "channel-maps", "feature-statistics"):
    text = re.sub(r"    from mednext_v2\..* import .*\n", "", features.text(id))
    text = re.sub(r"    (import numpy as np|import torch|from torch.nn import functional as F|from safetensors.torch import load_file)\n", "", text)
    features.set(id, re.sub(r'(    "[^\n]*"\n)\n+(?=    [a-z])', r"\1", re.sub(r"\n\n\n(?=    )", "\n\n", text)))
features.save()

# ---- report.collect
collect = Chapter(
    "report/15_collect", "collect", "Four tidy tables: all that tables, figures and claims read", "report.collect",
    "from pathlib import Path\n\nimport pandas as pd\n\nfrom mednext_v2.core import read_csv, root, write_csv, write_json\nfrom mednext_v2.data.preprocess import Prepared\nfrom mednext_v2.report.tables import summary\nfrom mednext_v2.scoring.ablations import MODEL_COLUMNS, model_row\nfrom mednext_v2.scoring.evaluate import SCORE_COLUMNS\nfrom mednext_v2.study.plan import Plan\nfrom mednext_v2.study.runs import Run, finetuning_runs, pretrained_folder",
    "import json\nimport tempfile\n\nfrom fastcore.test import test_eq",
)
collect.put(runs.cut("collect-heading", "collect-why", "collect", "collect-lesson"))
collect.put(ablations.cut("snapshot-features-text", "snapshot-features-text-2", "main-models"))
for id in ("collect", "main-models"):
    text = re.sub(r"    from mednext_v2\..* import .*\n", "", collect.text(id))
    collect.set(id, re.sub(r'(    "[^\n]*"\n)\n+(?=    )', r"\1", text))
collect.set("collect-lesson", "scratch = Path(tempfile.mkdtemp())\n" + collect.text("collect-lesson"))
collect.save()

ablations.set("imports", ablations.text("imports").replace("from collections.abc import Iterator\n", "from collections.abc import Iterator\n"))
text = ablations.text("imports")
text = text[: text.index("from mednext_v2.core import")] + '''from mednext_v2.core import atomic_folder, build, in_pool, params, read_csv, read_json, root, write_csv
from mednext_v2.scoring.evaluate import SCORE_COLUMNS, evaluate_one
from mednext_v2.study.plan import Plan, read_plan
from mednext_v2.study.runs import STAGE, Run, finetuning_runs, pretrained_folder, run_folder, train_one'''
ablations.set("imports", text)
ablations.save()
analysis.sub("top-text", ("effects of variants, gains by group, scaling laws, and how alike a network's channels are", "effects of variants, gains by group and scaling laws"))
analysis.save()

# ---- licences
zoo = Chapter("zoo/20_catalogue")
licence = Chapter(
    "models/25_licence", "licence", "What terms a fine-tuned model carries", "models.licence", "import re", "import pandas as pd",
)
why, passing = zoo.text("licence-why").split("\n\n")
zoo.set("licence-why", why)
licence.add("markdown", "licence-why", passing)
licence.put(zoo.cut("licence", "licence-lesson"))
licence.set("licence", licence.text("licence").replace("#| export\n", '#| export\nUNKNOWN = "not available"\n\n\n', 1))
licence.save()
zoo.sub("entry", ('UNKNOWN = "not available"\n', ""))
zoo.sub("imports", ("from mednext_v2.core import Kind,", "from mednext_v2.models.licence import UNKNOWN, kind_of\nfrom mednext_v2.core import Kind,"))
zoo.save()

# ---- runs: what is left trains
runs.sub("title", ("# pipeline\n> What the stages of `dvc.yaml` call: run a notebook, train many models side by side, evaluate, collect", "# runs\n> The trainings of a study, side by side"))
runs.cut("intro")
runs.set("imports", '''#| export
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from mednext_v2.core import Kind, atomic_folder, fingerprint_of, in_pool, read_csv, read_json, root, sha256, write_json
from mednext_v2.data.preprocess import Prepared, fold_view
from mednext_v2.models.card import read_card
from mednext_v2.study.plan import Plan
from mednext_v2.training.checkpoint import code_digest
from mednext_v2.training.run import train_in_processes''')
runs.set("test-imports", "#| hide\nfrom fastcore.test import test_eq")
for id in ("run-class", "train-one"):
    text = re.sub(r"    from mednext_v2\..* import .*\n", "", runs.text(id))
    runs.set(id, re.sub(r'(    "[^\n]*"\n)\n+(?=    )', r"\1", text))
text = runs.text("run-class")
text = re.sub(r"TRAINING_MODULES = .*", 'TRAINING_ROOMS = ("network", "models", "data", "training")', text).replace("TRAINING_MODULES", "TRAINING_ROOMS")
runs.set("run-class", text)
runs.set("train-one", runs.text("train-one").replace("#| export\n", "#| export\n" + pretrained + "\n\n\n", 1))
text = runs.text("learning-curves").replace("    from mednext_v2.report.tables import house_style\n\n    house_style()\n", "").replace("    from mednext_v2.study.tables import house_style\n\n    house_style()\n", "")
runs.set("learning-curves", text)
runs.save()

# ---- the code that a run depends on, by rooms
checkpoint = Chapter("training/30_checkpoint")
id = [cell["id"] for cell in checkpoint.book["cells"] if "def code_digest(" in "".join(cell["source"])][0]
checkpoint.sub(id, ("    modules: list[str],  # Of this package\n", "    rooms: Sequence[str],  # Sub-packages of this package\n"),
               ('    "A hash of the source of some modules"', '    "A hash of the source of some rooms"'),
               ('[(folder / f"{name}.py").read_text(encoding="utf-8") for name in modules]', '[path.read_text(encoding="utf-8") for room in rooms for path in sorted((folder / room).rglob("*.py"))]'))
id = next(cell["id"] for cell in checkpoint.book["cells"] if "#| export\nimport" in "".join(cell["source"]) or "#| export\nfrom" in "".join(cell["source"]))
checkpoint.set(id, checkpoint.text(id).replace("#| export\n", "#| export\nfrom collections.abc import Sequence\n", 1))
checkpoint.save()

# ---- files of data/ that are installed with the package
core.put([
    {"cell_type": "markdown", "id": "registry-file-why", "metadata": {}, "source": "The registries of data sets and of public models lie in `data/`, where people look for them, and are installed inside the package."},
    {"cell_type": "code", "id": "registry-file", "execution_count": None, "metadata": {}, "outputs": [], "source": """#| export
def registry_file(
    name: str,  # datasets.yaml or zoo.yaml
) -> Path:
    "A registry as it is installed with the package; that of the clone, if the installation is editable"
    package = Path(__file__).parent
    installed = package / "registries" / name
    return installed if installed.is_file() else package.parent / "data" / name"""},
    {"cell_type": "code", "id": "registry-file-lesson", "execution_count": None, "metadata": {}, "outputs": [], "source": """from mednext_v2.core import registry_file

assert registry_file("datasets.yaml").is_file() and registry_file("zoo.yaml").is_file()"""},
], "root-lesson")
core.save()
datasets = Chapter("data/20_datasets")
text = datasets.text("load-tasks")
at = text.index("        installed = Path(__file__)")
end = text.index("def load_tasks(")
datasets.set("load-tasks", text[:at] + '        return registry_file("datasets.yaml")\n\n\n' + text[end:])
id = [cell["id"] for cell in datasets.book["cells"] if "from mednext_v2.core import" in "".join(cell["source"]) and "export" in "".join(cell["source"])][0]
text = datasets.text(id)
datasets.set(id, re.sub(r"\broot, ", "registry_file, root, ", text, count=1) if "root, " in text else text)
datasets.save()
text = zoo.text("load")
at, end = text.index("def zoo_file("), text.index("def members_of(")
zoo.set("load", text[:at] + text[end:].replace("path or zoo_file()", 'path or registry_file("zoo.yaml")'))
zoo.set("imports", zoo.text("imports").replace("from importlib.resources import files\n", "").replace("read_yaml, room,", "read_yaml, registry_file, room,"))
text = zoo.book["cells"]
for cell in text:
    cell["source"] = "".join(cell["source"]).replace('path or zoo_file()', 'path or registry_file("zoo.yaml")')
zoo.save()
