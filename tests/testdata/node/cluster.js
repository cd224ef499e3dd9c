// A master and its 8 workers: it counts the requests that they report, and starts
// another one when one has died. A worker has a child, and GET /busy keeps it
// from hearing of anything.
'use strict'
const cluster = require('cluster')
const fs = require('fs')
const http = require('http')
const { spawn } = require('child_process')

process.on('SIGTERM', () => process.exit(0))
process.on('exit', () => fs.writeFileSync('exited.' + process.pid, ''))

if (cluster.isMaster) {
  let requests = 0
  let listening = 0
  const start = () => cluster.fork().on('message', m => {
    if (m.cmd === 'notifyRequest') console.log('requests', ++requests)
  })
  for (let i = 0; i < 8; i++) start()
  cluster.on('listening', () => { if (++listening >= 8) console.log('up', process.pid) })
  cluster.on('exit', w => {
    console.log('died', w.process.pid)
    start()
  })
} else {
  spawn('sleep', ['60'])
  http.createServer((req, res) => {
    process.send({ cmd: 'notifyRequest' })
    if (req.url === '/busy') {
      res.on('finish', () => { for (const end = Date.now() + 60000; Date.now() < end;); })
    }
    res.end(`0 ${process.pid}\n`)
  }).listen(Number(process.argv[2]), '127.0.0.1')
}
