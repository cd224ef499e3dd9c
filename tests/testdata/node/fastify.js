const app = require('fastify')()
app.get('/', async () => `${process.env.PGROUP_WORKER} ${process.pid}\n`)
app.listen(JSON.parse(process.argv[2])).then(() => console.log(JSON.stringify(app.server.address())))
