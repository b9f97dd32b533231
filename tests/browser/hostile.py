"""A title that would change a page and ask the network, were it not shown as text."""

HOSTILE = '<img src="http://example.invalid/x" onerror="document.title=1"><script>document.title=2</script>'
