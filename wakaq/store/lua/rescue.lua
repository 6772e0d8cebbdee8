-- Puts a page of what a dead supervisor had in flight back to the front of its queue, the first one
-- foremost.
-- KEYS[1]  hash, supervisor id -> 'number token gave'
-- KEYS[2]  in flight (hash)    KEYS[3]  queue (list)    KEYS[4]  stats (hash)
-- ARGV[1]  supervisor id, then for each payload: number, the payload, and what to push
-- Returns how many were still there, or an error if the queue cannot be pushed to: the rest stays
-- where it is.
redis.call('HDEL', KEYS[1], ARGV[1]) -- again: a failover may have brought it back
local moved, redelivered = 0, 0
for i = #ARGV - 2, 2, -3 do
  local number, payload, new = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if redis.call('HGET', KEYS[2], number) == payload then
    local reply = redis.pcall('LPUSH', KEYS[3], new)
    if type(reply) == 'table' then return reply end
    redis.call('HDEL', KEYS[2], number)
    moved = moved + 1
    if new ~= payload then redelivered = redelivered + 1 end
  end
end
if redelivered > 0 then redis.pcall('HINCRBY', KEYS[4], 'redelivered', redelivered) end
return moved
