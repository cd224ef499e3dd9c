// A plain server that knows nothing of clusters. What it listens on is argv[2], as
// for listen(). It tells who it is; the answer to /slow ends when the request does.
'use strict'
const fs = require('fs')
const http = require('http')

const server = http.createServer((req, res) => {
  if (process.send) process.send({ cmd: 'notifyRequest' })
  if (req.url === '/slow') {
    res.write('first half')
    req.resume().on('end', () => res.end(', second half'))
  } else {
    res.end(`${process.env.PGROUP_WORKER} ${process.pid}\n`)
  }
})
process.on('SIGTERM', () => process.exit(0))
process.on('exit', () => fs.writeFileSync('exited.' + process.pid, ''))
server.on('error', e => {
  console.log(e.code)
  process.exit(1)
})
server.listen(JSON.parse(process.argv[2]), () => console.log(JSON.stringify(server.address())))
