const app = require('express')()
app.get('/', (req, res) => res.send(String(process.pid)))
const server = app.listen(0, () => process.send({ listening: server.address() }))
