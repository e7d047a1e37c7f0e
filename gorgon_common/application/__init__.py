"""What people and programs may ask of Gorgon: one module per resource, called by the command line and the API.

Each function takes the wired `bootstrap.Services` and the `Scope` of the caller.  `session.Session` binds the two, and
has the same methods as the HTTP client.  Only this package calls the stores on behalf of a caller.
"""
