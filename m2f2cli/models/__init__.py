"""The networks. Importing this package makes torchvision importable first (see ``runtime``)."""

from m2f2cli.runtime import cure_torchvision

cure_torchvision()
