"""Reads settings.ini, so that version, description, requirements and console script are written once."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {
    name: cfg[f"{name}_requirements"].split()
    for name in ("train", "convert", "dicom", "remote", "cluster", "backbones", "hub", "export", "openvino", "bundle", "nnunet", "review", "pipeline", "docs", "dev")
}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    # The registry lies in data/, where people look for it, and is installed inside the package
    packages=[*find_packages(include=["mednext_v2", "mednext_v2.*"]), "mednext_v2.registries"],
    package_dir={"mednext_v2.registries": "data"},
    package_data={"mednext_v2": ["py.typed", "__init__.pyi"], "mednext_v2.registries": ["datasets.yaml", "zoo.yaml"]},
    entry_points={"console_scripts": cfg["console_scripts"].split("\n"), "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
