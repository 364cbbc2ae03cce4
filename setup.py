"Hands settings.ini to setuptools: every fact about the package stands there."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

SETTINGS = "settings.ini"
here = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=["="])
settings.read_string((here / SETTINGS).read_text(encoding="utf-8"))
project = settings["project"]
package = project["name"]


class SourceDistribution(sdist):
    "A source distribution that carries the settings, without which this file can't run."

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        "Put the settings beside the files that setuptools finds by itself."
        super().make_release_tree(base_dir, [*files, SETTINGS])


setup(
    name=package,
    version=project["version"],
    description=project["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=project["author"],
    license=project["license"],
    license_files=["LICENSE"],
    keywords=project["keywords"].split(),
    python_requires=f">={project['min_python']}",
    install_requires=project["requirements"].split(),
    extras_require={name: value.split() for name, value in settings["extras"].items()},
    entry_points={"console_scripts": [f"{name} = {value}" for name, value in settings["console_scripts"].items()]},
    # The top-level data/ folder travels inside the wheel, as the package's own data folder.
    packages=[*find_packages(include=[package, f"{package}.*"]), f"{package}.data"],
    package_dir={f"{package}.data": "data"},
    package_data={f"{package}.data": ["**/*"]},
    cmdclass={"sdist": SourceDistribution},
)
