"""How to lay a job over a mesh, as plain data: the mesh, the plan, its text forms, its checks."""
