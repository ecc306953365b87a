"""Ingest: from folders, archives and files as scanners and hospitals leave them to a de-identified volume store.

    megamed.data.ingest.engine.run(["study.zip"], "store")
"""
