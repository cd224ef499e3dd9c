const app = require('express')()
app.get('/', (req, res) => res.send(`${process.env.PGROUP_WORKER} ${process.pid}\n`))
const server = app.listen(JSON.parse(process.argv[2]), () => console.log(JSON.stringify(server.address())))
