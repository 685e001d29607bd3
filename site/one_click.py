"""Links that open a unit's notebook in the cloud. This table is the only place that has their addresses."""

from __future__ import annotations

# Service: address, with the repository ("owner/name") and the notebook's path in it.
SERVICES = {
    "Google Colab": "https://colab.research.google.com/github/{repository}/blob/HEAD/{notebook}",
    "GitHub Codespaces": "https://codespaces.new/{repository}",
}


def links(repository: str, notebook: str) -> str:
    """Links to a notebook in each service, as Markdown; "" if the repository is not known.

    Args:
        repository: "owner/name" on GitHub.
        notebook: its path in the repository.
    """
    if not repository:
        return ""
    addresses = {name: address.format(repository=repository, notebook=notebook) for name, address in SERVICES.items()}
    return " · ".join(f"[{name}]({address})" for name, address in addresses.items())
