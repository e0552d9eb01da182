"""The original programs' command lines, on glimt: what they take, and where they put their files.

Each is a translation into arguments of `glimt`; nothing here computes, but for the captions that
MindIE's script prints. docs/original-programs.md is the table of both sides.
"""
