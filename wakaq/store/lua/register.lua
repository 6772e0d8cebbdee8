-- Announces a supervisor, before its first claim, under an id that nobody has.
-- KEYS[1]  hash, supervisor id -> 'number token gave'    KEYS[2]  hash, supervisor id -> entry
-- ARGV[1]  supervisor id    ARGV[2]  entry (JSON)
-- Returns the token for its first turn, or nil if the id is taken: a late attempt cannot set a
-- number back.
redis.call('HDEL', KEYS[1], '') -- a write that frees memory comes first, see turn.lua
local now = redis.call('TIME')
local token = string.format('%d%06d', now[1], now[2])
if redis.call('HSETNX', KEYS[1], ARGV[1], '0 ' .. token) == 0 then return false end
local reply = redis.pcall('HSET', KEYS[2], ARGV[1], ARGV[2])
if type(reply) == 'table' then -- nobody is to watch for one that never lived
  redis.call('HDEL', KEYS[1], ARGV[1])
  return reply
end
return token
