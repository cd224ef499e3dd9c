const app = require('fastify')()
app.get('/', async () => String(process.pid))
app.listen({ port: 0, host: '127.0.0.1' }).then(() => process.send({ listening: app.server.address() }))
