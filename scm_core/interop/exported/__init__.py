# SPDX-License-Identifier: Apache-2.0
"""What goes into the folder of an exported diffusers pipeline beside this project's own modules; `interop.export` writes it."""
